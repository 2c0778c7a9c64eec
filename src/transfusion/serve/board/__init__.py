"""`transfusion board`: a page that shows the runs of a folder, and follows those under way."""
