"""One file per dataset; `kvilt.registry.build("task", "nq:path=FILE,gold=3")` makes a task."""
