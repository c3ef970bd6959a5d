"""Is it right, and why not: correctness gates, the doctor, comparison with full recompute."""
