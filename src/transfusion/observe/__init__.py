"""What a run tells about itself: its folder and log, its metrics, its clock, its memory, its progress."""

from transfusion.observe.clock import Clock, Lap
from transfusion.observe.console import start_logging
from transfusion.observe.memory import peak_gib
from transfusion.observe.metrics import MetricsLog, StepMetrics, read_metrics
from transfusion.observe.progress import Progress
from transfusion.observe.runfolder import RunFolder
from transfusion.observe.sinks import Sink, open_sink

__all__ = [
    "Clock",
    "Lap",
    "MetricsLog",
    "Progress",
    "RunFolder",
    "Sink",
    "StepMetrics",
    "open_sink",
    "peak_gib",
    "read_metrics",
    "start_logging",
]
