"""Prefill on one engine, decode on another (1P1D), behind one core: see `docs/scaling.md`."""
