def ranks(report): "x"
interruption = end = ranks
