"""The parameters of each kind of block that models are made of, one file per kind."""
