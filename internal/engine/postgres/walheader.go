package postgres

// WALPageSize is PostgreSQL's default XLOG_BLCKSZ, 8 KiB, the only one that pgark supports.
const WALPageSize = 8192
