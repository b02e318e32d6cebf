"""Features -> scores: what two data sets allow, and the protocol of every evaluator."""
