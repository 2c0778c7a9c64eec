"""The two objectives, as sums and counts of a batch: Transfusion's and that of the Chameleon baseline."""
