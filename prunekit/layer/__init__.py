"""One linear map, the statistics of its inputs, and answers to the question what to keep."""
