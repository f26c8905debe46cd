"""Memory for K and V behind one protocol, virtual or paged; knows requests by name only."""
