"""Function calls: a user's Python on samples, such as a reward, in killable processes beside a worker."""
