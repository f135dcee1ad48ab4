"""What pruned models are written as: configurations and code of each layout, and files of other programs."""
