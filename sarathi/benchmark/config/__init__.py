"""Configuration of a run: schema (every knob), default.yml (generated from it), options, engine configuration."""
