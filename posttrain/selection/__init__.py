"""Which weights train: plans, selectors, schedules and backends."""
