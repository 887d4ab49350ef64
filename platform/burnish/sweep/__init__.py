"""Search over recipes: the trials of a space (pure), and their run on Ray Tune."""
