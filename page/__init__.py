"""The parts of a run's page: what is put together by report.py."""
