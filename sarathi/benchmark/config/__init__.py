"""What configures a run: schema (every knob), default.yml (the same as a file), options, and the engine's share."""
