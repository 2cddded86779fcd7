"""Options, presets and the coefficient specification: everything a user can say. Imports no torch."""
