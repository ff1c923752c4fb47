"""Models: scopes and runs, initialising, training, gradients."""
