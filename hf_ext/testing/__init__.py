"""What packages of plugins can test themselves with: conformance suites and a local Hub."""
