"""COPO inside other trainers."""
