"""From a dataset and a machine to the settings of a run, each with its reason."""
