"""What people see: tables for a terminal, figures, one JSON document a run."""
