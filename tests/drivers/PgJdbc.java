// pgjdbc, in each of its query modes, with statements prepared at once or in time, batches rewritten and saved or not: batches and their failures, cursors by fetchSize, columns that change under a prepared statement, COPY, large
// objects, XA, LISTEN, cancel. Prints what it finds; nothing that depends on time.
import java.sql.Connection;
import java.sql.BatchUpdateException;
import java.sql.DriverManager;
import java.sql.PreparedStatement;
import java.sql.ResultSet;
import java.sql.SQLException;
import java.sql.Savepoint;
import java.sql.Statement;
import java.util.Arrays;
import javax.transaction.xa.XAResource;
import javax.transaction.xa.Xid;
import org.postgresql.PGConnection;
import org.postgresql.PGNotification;
import org.postgresql.copy.CopyManager;
import org.postgresql.largeobject.LargeObject;
import org.postgresql.largeobject.LargeObjectManager;
import org.postgresql.xa.PGXADataSource;

public class PgJdbc {
    static final String URL = "jdbc:postgresql://" + System.getenv("PGHOST") + ":" + System.getenv("PGPORT") + "/"
            + System.getenv("PGDATABASE") + "?user=" + System.getenv("PGUSER") + "&password=" + System.getenv("PGPASSWORD")
            + "&sslmode=disable";
    static String options = "";

    interface Step {
        Object run(Connection c) throws Exception;
    }

    static Connection connect(String more) throws SQLException {
        return DriverManager.getConnection(URL + more);
    }

    static void step(Connection c, String name, Step step) {
        String found;
        try {
            found = String.valueOf(step.run(c));
        } catch (SQLException e) {
            found = e.getClass().getSimpleName() + " " + e.getSQLState() + " " + e.getMessage().split("\n")[0];
        } catch (Exception e) {
            found = e.toString();
        }
        System.out.println(options + " " + name + ": " + found);
    }

    static String rows(ResultSet r) throws SQLException {
        StringBuilder all = new StringBuilder();
        int columns = r.getMetaData().getColumnCount();
        while (r.next()) {
            for (int i = 1; i <= columns; i++) {
                all.append(r.getString(i)).append(i < columns ? "," : ";");
            }
        }
        r.close();
        return all.toString();
    }

    static String ask(Connection c, String sql) throws SQLException {
        try (Statement s = c.createStatement()) {
            return rows(s.executeQuery(sql));
        }
    }

    static void run(Connection c, String sql) throws SQLException {
        try (Statement s = c.createStatement()) {
            s.execute(sql);
        }
    }

    static String state(Connection c, String sql) {
        try {
            run(c, sql);
            return "done";
        } catch (SQLException e) {
            return e.getSQLState();
        }
    }

    static Object batch(Connection c, int from, int to) throws SQLException {
        try (PreparedStatement s = c.prepareStatement("INSERT INTO t VALUES (?, ?)")) {
            for (int i = from; i < to; i++) {
                s.setInt(1, i);
                s.setString(2, "v" + i);
                s.addBatch();
            }
            return s.executeBatch().length;
        } catch (BatchUpdateException e) {
            return e.getSQLState() + " " + Arrays.toString(e.getUpdateCounts());
        }
    }

    static Object ownWrites(Connection c) throws SQLException {
        int stale = 0;
        try (PreparedStatement update = c.prepareStatement("UPDATE t SET v = ? WHERE i = ?");
                PreparedStatement select = c.prepareStatement("SELECT v FROM t WHERE i = ?")) {
            for (int i = 0; i < 12; i++) {
                update.setString(1, "w" + i);
                update.setInt(2, i);
                update.executeUpdate();
                select.setInt(1, i);
                stale += rows(select.executeQuery()).equals("w" + i + ";") ? 0 : 1;
            }
        }
        return stale;
    }

    static Object portions(Connection c) throws SQLException {
        c.setAutoCommit(false);
        int count = 0;
        try (PreparedStatement s = c.prepareStatement("SELECT i FROM t ORDER BY i");
                PreparedStatement u = c.prepareStatement("UPDATE t SET v = 'q' WHERE i = ?")) {
            s.setFetchSize(7);
            ResultSet r = s.executeQuery();
            while (r.next()) {
                if (++count % 50 == 0) {
                    u.setInt(1, r.getInt(1));
                    u.executeUpdate();
                }
            }
        } finally {
            c.rollback();
            c.setAutoCommit(true);
        }
        return count;
    }

    static Object changedColumns(Connection c) throws SQLException {
        StringBuilder found = new StringBuilder();
        run(c, "DROP TABLE IF EXISTS columns; CREATE TABLE columns (a int)");
        try (PreparedStatement s = c.prepareStatement("SELECT * FROM columns")) {
            for (int i = 0; i < 7; i++) {
                rows(s.executeQuery());
            }
            run(c, "ALTER TABLE columns ADD b text");
            for (int i = 0; i < 3; i++) {
                try {
                    found.append(s.executeQuery().getMetaData().getColumnCount()).append(' ');
                } catch (SQLException e) {
                    found.append(e.getSQLState()).append(' ');
                }
            }
        }
        return found;
    }

    static Object failedTransaction(Connection c) throws SQLException {
        c.setAutoCommit(false);
        String found;
        try {
            run(c, "INSERT INTO t VALUES (2000, 'a')");
            found = state(c, "INSERT INTO t VALUES (1, 'twice')") + " " + state(c, "SELECT 1");
            c.commit();
        } catch (SQLException e) {
            found = e.getSQLState();
            c.rollback();
        }
        c.setAutoCommit(true);
        return found + " " + ask(c, "SELECT count(*) FROM t WHERE i = 2000");
    }

    static Object savepoints(Connection c) throws SQLException {
        c.setAutoCommit(false);
        run(c, "INSERT INTO t VALUES (4000, 's')");
        Savepoint x = c.setSavepoint("x");
        run(c, "INSERT INTO t VALUES (4001, 's')");
        c.rollback(x);
        c.releaseSavepoint(x);
        c.commit();
        c.setAutoCommit(true);
        return ask(c, "SELECT i FROM t WHERE i >= 4000 ORDER BY i");
    }

    static Object copies(Connection c) throws Exception {
        CopyManager copy = ((PGConnection) c).getCopyAPI();
        run(c, "DROP TABLE IF EXISTS copied; CREATE TABLE copied (a int, b text)");
        long in = copy.copyIn("COPY copied FROM STDIN", new java.io.StringReader("1\tx\n".repeat(2000)));
        java.io.StringWriter out = new java.io.StringWriter();
        long rows = copy.copyOut("COPY copied TO STDOUT", out);
        String failed = "";
        try {
            copy.copyIn("COPY copied FROM STDIN", new java.io.StringReader("bad\n"));
        } catch (SQLException e) {
            failed = e.getSQLState();
        }
        copy.copyIn("COPY copied FROM STDIN").cancelCopy();
        return in + " " + rows + " " + out.toString().length() + " " + failed + " " + ask(c, "SELECT count(*) FROM copied");
    }

    static Object largeObject(Connection c) throws SQLException {
        c.setAutoCommit(false);
        LargeObjectManager manager = ((PGConnection) c).getLargeObjectAPI();
        long oid = manager.createLO();
        LargeObject object = manager.open(oid, LargeObjectManager.READWRITE);
        object.write(new byte[100000]);
        object.seek(0);
        int length = object.read(200000).length;
        object.close();
        manager.unlink(oid);
        c.commit();
        c.setAutoCommit(true);
        return length;
    }

    static Object forgotten(Connection c) throws SQLException {
        try (PreparedStatement s = c.prepareStatement("SELECT 77")) {
            for (int i = 0; i < 7; i++) {
                rows(s.executeQuery());
            }
            run(c, "DEALLOCATE ALL");
            String found = rows(s.executeQuery());
            run(c, "DISCARD ALL");
            return found + rows(s.executeQuery());
        }
    }

    static Object otherSchema(Connection c) throws SQLException {
        run(c, "CREATE SCHEMA IF NOT EXISTS other; DROP TABLE IF EXISTS other.t; CREATE TABLE other.t (i text)");
        try (PreparedStatement s = c.prepareStatement("SELECT count(*) > 0 FROM t")) {
            for (int i = 0; i < 7; i++) {
                rows(s.executeQuery());
            }
            run(c, "SET search_path = other");
            String found = rows(s.executeQuery());
            run(c, "RESET search_path");
            return found + rows(s.executeQuery());
        }
    }

    static Object twoPhases(Connection unused) throws Exception {
        PGXADataSource source = new PGXADataSource();
        source.setUrl(URL);
        javax.sql.XAConnection xa = source.getXAConnection();
        XAResource resource = xa.getXAResource();
        Xid xid = new Xid() {
            public int getFormatId() {
                return 1;
            }

            public byte[] getGlobalTransactionId() {
                return new byte[] {1, 2, 3};
            }

            public byte[] getBranchQualifier() {
                return new byte[] {4};
            }
        };
        Connection c = xa.getConnection();
        resource.start(xid, XAResource.TMNOFLAGS);
        run(c, "INSERT INTO t VALUES (5000, 'xa')");
        resource.end(xid, XAResource.TMSUCCESS);
        resource.prepare(xid);
        int prepared = resource.recover(XAResource.TMSTARTRSCAN).length;
        resource.commit(xid, false);
        String found = prepared + " " + ask(c, "SELECT v FROM t WHERE i = 5000");
        xa.close();
        return found;
    }

    static Object notified(Connection c) throws SQLException {
        run(c, "LISTEN channel");
        run(c, "NOTIFY channel, 'hello'");
        PGNotification[] heard = ((PGConnection) c).getNotifications(5000);
        return heard[0].getParameter() + " " + (heard[0].getPID() == ((PGConnection) c).getBackendPID());
    }

    static Object timedOut(Connection c) throws SQLException {
        try (Statement s = c.createStatement()) {
            s.setQueryTimeout(1);
            s.executeQuery("SELECT pg_sleep(30)");
            return "not cancelled";
        } catch (SQLException e) {
            return e.getSQLState() + " " + ask(c, "SELECT 1");
        }
    }

    static void all() throws SQLException {
        try (Connection c = connect(options)) {
            step(c, "tables", x -> {
                run(x, "DROP TABLE IF EXISTS t CASCADE; CREATE TABLE t (i int PRIMARY KEY, v text)");
                return "";
            });
            step(c, "batch", x -> batch(x, 0, 300) + " " + ask(x, "SELECT count(*), sum(i) FROM t"));
            step(c, "batch that fails", x -> batch(x, 298, 305) + " " + ask(x, "SELECT count(*) FROM t"));
            step(c, "own writes missed", PgJdbc::ownWrites);
            step(c, "rows in portions", PgJdbc::portions);
            step(c, "changed columns", PgJdbc::changedColumns);
            step(c, "failed transaction", PgJdbc::failedTransaction);
            step(c, "savepoints", PgJdbc::savepoints);
            step(c, "copy", PgJdbc::copies);
            step(c, "large object", PgJdbc::largeObject);
            step(c, "forgotten statements", PgJdbc::forgotten);
            step(c, "other schema", PgJdbc::otherSchema);
        }
    }

    public static void main(String[] arguments) throws Exception {
        for (String mode : new String[] {"simple", "extended", "extendedForPrepared", "extendedCacheEverything"}) {
            for (String threshold : new String[] {"1", "5"}) {
                for (String autosave : new String[] {"never", "always"}) {
                    options = "&preferQueryMode=" + mode + "&prepareThreshold=" + threshold + "&autosave=" + autosave
                            + "&reWriteBatchedInserts=" + !autosave.equals("never");
                    all();
                }
            }
        }
        for (String type : new String[] {"any", "primary", "preferPrimary", "secondary", "preferSecondary"}) {
            options = "&targetServerType=" + type;
            step(null, "connects", x -> {
                try (Connection c = connect(options)) {
                    return ask(c, "SELECT pg_is_in_recovery()");
                }
            });
        }
        options = "";
        try (Connection c = connect("")) {
            step(c, "two phases", PgJdbc::twoPhases);
            step(c, "notified", PgJdbc::notified);
            step(c, "timed out", PgJdbc::timedOut);
            c.setReadOnly(true);
            step(c, "read only", x -> state(x, "INSERT INTO t VALUES (9999, '')"));
        }
    }
}
