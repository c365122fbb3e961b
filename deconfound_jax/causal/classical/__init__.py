"""Reference estimators: each a plain function with a published standard error, to check the posterior against."""
