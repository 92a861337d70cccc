"""dltrain: train, evaluate and look at classic image classifiers from one YAML file."""

__version__ = "0.1.0"
