"""How good a model is: scores over a held-out split, and which model carries the alias that is served."""
