-- For PostgreSQL 15 and later, as a superuser, in the database postgres.
CREATE ROLE pgark LOGIN REPLICATION;
GRANT pg_read_all_settings TO pgark;
GRANT EXECUTE ON FUNCTION pg_catalog.pg_backup_start(text,boolean) TO pgark;
GRANT EXECUTE ON FUNCTION pg_catalog.pg_backup_stop(boolean) TO pgark;
GRANT EXECUTE ON FUNCTION pg_catalog.pg_switch_wal() TO pgark;
GRANT EXECUTE ON FUNCTION pg_catalog.pg_create_restore_point(text) TO pgark;
GRANT EXECUTE ON FUNCTION pg_catalog.pg_reload_conf() TO pgark;
GRANT ALTER SYSTEM ON PARAMETER archive_command TO pgark;
