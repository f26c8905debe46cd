"""What the scripts that measure share: rows and files, pictures, time budgets, work. Knows no result."""
