"""Training, evaluation, benchmarks and the demo: what a serving process never imports."""
