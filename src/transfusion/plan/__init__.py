"""What a run will take, before a GPU is used: `make_plan` predicts, `report` says it, `advice` mends it."""

from transfusion.plan.prediction import Plan, make_plan
from transfusion.plan.report import report, warnings
from transfusion.plan.workload import DocumentMix

__all__ = ["DocumentMix", "Plan", "make_plan", "report", "warnings"]
