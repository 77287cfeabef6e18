"""Small trained parts that make a stock model drop tokens for good."""
