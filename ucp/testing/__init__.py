"""What others test their own stores and converters with: hypothesis strategies and conformance suites."""
