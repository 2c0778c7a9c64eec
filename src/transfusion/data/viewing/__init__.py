"""What the data look like: figures of a plan, a page of rows, the commands that show both."""
