"""What a run will take, before a GPU is used: `make_plan` predicts, `report` says it, `advice` mends it."""

from transfusion.plan.prediction import Plan, make_plan
from transfusion.plan.report import report, warnings
from transfusion.plan.workload import Mixture

__all__ = ["Mixture", "Plan", "make_plan", "report", "warnings"]
