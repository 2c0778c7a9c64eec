"""What proves the kernels without a GPU: compiled forms, their machine code, and what tests share. Not in the wheel."""
