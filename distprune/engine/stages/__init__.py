"""The stages of a run that the workers carry out, one class each."""
