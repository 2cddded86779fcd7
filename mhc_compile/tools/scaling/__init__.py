"""What hyper-connections cost at sizes that this machine cannot run: `shapes`, `model` (the plain one), `estimate`, `table`."""
