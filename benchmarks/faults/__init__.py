"""The proof of the doctor: faults put into real runs on purpose, healthy runs, and what it costs.

Run: ``python -m benchmarks.faults matrix|healthy|overhead|table --help``
"""
