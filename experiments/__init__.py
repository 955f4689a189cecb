"""Learning experiments: grids of trainings, their results, tables and figures."""
