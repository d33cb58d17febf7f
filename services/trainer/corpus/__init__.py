"""From the files of a dataset to rows of tokens: cut, rendered and packed."""
