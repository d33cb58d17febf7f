"""The scanner: a snapshot in, a verdict for every file and a dataset out."""
