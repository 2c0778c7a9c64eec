"""What ranks do in the distributed tests, a file for each subject. `worker.py` runs them, the tests judge them."""
