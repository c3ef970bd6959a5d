"""Evaluation: tasks, metrics, per-sample records, and the report (docs/evaluation.md)."""
