"""DeepSpeed jobs with tensor parallelism, apart from the others: their cases are cached by themselves."""
