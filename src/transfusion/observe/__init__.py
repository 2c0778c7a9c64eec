"""What a run tells about itself: its folder and log, its metrics, its clock, its memory, its progress."""
