"""What a model is: `config.json` as a `ModelSpec`, and its parameters as data.

Everything that tightfit knows about an architecture lives here, once. `families/` turns the config
of one architecture into a `ModelSpec`; `parameters` lists what an engine holds for such a spec;
`layout` says which piece of each checkpoint tensor a rank gets.
"""
