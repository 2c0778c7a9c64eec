"""What a run tells about itself: its folder and log, its metrics, its clock, its memory, its progress."""

from transfusion.observe.clock import Clock, Interval
from transfusion.observe.console import start_logging
from transfusion.observe.memory import peak_gib
from transfusion.observe.metrics import MetricsLog, StepMetrics, read_metrics
from transfusion.observe.progress import Progress
from transfusion.observe.runfolder import RunFolder
from transfusion.observe.sinks import MetricLogger, open_metric_logger

__all__ = [
    "Clock",
    "Interval",
    "MetricLogger",
    "MetricsLog",
    "Progress",
    "RunFolder",
    "StepMetrics",
    "open_metric_logger",
    "peak_gib",
    "read_metrics",
    "start_logging",
]
