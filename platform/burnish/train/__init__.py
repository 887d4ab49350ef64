"""From packs to trained weights: model, attention, objective, engine, loop, checkpoints, and the launch on Ray."""
