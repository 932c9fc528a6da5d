import java.io.BufferedReader;
import java.io.IOException;
import java.io.InputStreamReader;
import java.io.StringReader;
import java.io.StringWriter;
import java.math.BigDecimal;
import java.sql.Connection;
import java.sql.DriverManager;
import java.sql.PreparedStatement;
import java.sql.ResultSet;
import java.sql.SQLException;
import java.sql.Savepoint;
import java.sql.Statement;
import java.util.ArrayList;
import java.util.List;
import org.postgresql.PGConnection;
import org.postgresql.PGStatement;

/**
 * PostgreSQL's JDBC driver, asked line by line: a task and the URL of a connection, with a tab between them. Answers in
 * one line each: "ok" and a value, or "error" with its SQLSTATE and text.
 */
public final class Driver {
    private static final String SLEEP = "SELECT pg_sleep(60)";

    private interface Work {
        void run() throws SQLException;
    }

    public static void main(String[] arguments) throws IOException {
        BufferedReader lines = new BufferedReader(new InputStreamReader(System.in));
        for (String line = lines.readLine(); line != null; line = lines.readLine()) {
            String[] parts = line.split("\t");
            try (Connection connection = DriverManager.getConnection(parts[1])) {
                answer("ok", run(parts[0], connection, parts[1]));
            } catch (SQLException error) {
                answer("error", String.valueOf(error.getSQLState()), error.getMessage());
            } catch (Exception error) {
                answer("error", "", error.toString());
            }
        }
    }

    private static void answer(String... parts) {
        List<String> cleaned = new ArrayList<>();
        for (String part : parts) {
            cleaned.add(part.replaceAll("[\t\n]", " "));
        }
        System.out.println(String.join("\t", cleaned));
    }

    private static String run(String task, Connection connection, String url) throws Exception {
        switch (task) {
            case "who":
                return one(connection, "SELECT current_user");
            case "work":
                List<String> found = new ArrayList<>();
                prepared(connection, found);
                errors(connection, found);
                transactions(connection, found);
                cursor(connection, found);
                copy(connection, found);
                return found.toString();
            case "cancel":
                return cancel(connection, url);
            case "timeout":
                return timeout(connection);
            default:
                throw new IllegalArgumentException(task);
        }
    }

    private static String one(Connection connection, String sql) throws SQLException {
        try (Statement statement = connection.createStatement(); ResultSet rows = statement.executeQuery(sql)) {
            rows.next();
            return rows.getString(1);
        }
    }

    private static String sqlState(Work work) {
        try {
            work.run();
        } catch (SQLException error) {
            return error.getSQLState();
        }
        throw new AssertionError("no error came");
    }

    /** Enough turns for the driver to name the statement at the server, and to change to binary values. */
    private static void prepared(Connection connection, List<String> found) throws SQLException {
        try (PreparedStatement statement = connection.prepareStatement("SELECT ?::int * 2, ?::text, ?::numeric")) {
            for (int turn = 0; turn < 12; turn++) {
                statement.setInt(1, turn);
                statement.setString(2, "it's");
                statement.setBigDecimal(3, new BigDecimal("1.50"));
                try (ResultSet rows = statement.executeQuery()) {
                    rows.next();
                    found.add(rows.getInt(1) + rows.getString(2) + rows.getBigDecimal(3));
                }
            }
            found.add(String.valueOf(statement.unwrap(PGStatement.class).isUseServerPrepare()));
        }
    }

    private static void errors(Connection connection, List<String> found) throws SQLException {
        for (String wrong : new String[] {"SELECT 1/0", "nonsense"}) {
            found.add(sqlState(() -> one(connection, wrong)));
        }
    }

    private static void transactions(Connection connection, List<String> found) throws SQLException {
        connection.setAutoCommit(false);
        String insert = "INSERT INTO numbers VALUES (?, ?)";
        try (PreparedStatement statement = connection.prepareStatement(insert)) {
            for (int number = 0; number < 500; number++) {
                statement.setInt(1, number);
                statement.setString(2, "batched");
                statement.addBatch();
            }
            found.add(String.valueOf(statement.executeBatch().length));
            Savepoint savepoint = connection.setSavepoint();
            statement.setInt(1, 1);
            statement.setString(2, "twice");
            found.add(sqlState(statement::executeUpdate));
            found.add(sqlState(() -> one(connection, "SELECT 1")));
            connection.rollback(savepoint);
        }
        connection.commit();
        try (Statement statement = connection.createStatement()) {
            found.add(String.valueOf(statement.executeUpdate("DELETE FROM numbers")));
        }
        connection.rollback();
        found.add(one(connection, "SELECT count(*) FROM numbers"));
        connection.commit();
        connection.setAutoCommit(true);
    }

    /** A portal that is fetched from in parts. */
    private static void cursor(Connection connection, List<String> found) throws SQLException {
        connection.setAutoCommit(false);
        try (Statement statement = connection.createStatement()) {
            statement.setFetchSize(77);
            long length = 0;
            String sql = "SELECT repeat(md5(n::text), 10) FROM generate_series(1, 20000) n";
            try (ResultSet rows = statement.executeQuery(sql)) {
                while (rows.next()) {
                    length += rows.getString(1).length();
                }
            }
            found.add(String.valueOf(length));
        }
        connection.commit();
        connection.setAutoCommit(true);
    }

    private static void copy(Connection connection, List<String> found) throws Exception {
        PGConnection own = connection.unwrap(PGConnection.class);
        StringBuilder lines = new StringBuilder();
        for (int number = 1000; number < 4000; number++) {
            lines.append(number).append("\tcopied\n");
        }
        String in = "COPY numbers FROM STDIN";
        found.add(String.valueOf(own.getCopyAPI().copyIn(in, new StringReader(lines.toString()))));
        StringWriter out = new StringWriter();
        own.getCopyAPI().copyOut("COPY (SELECT * FROM numbers ORDER BY n) TO STDOUT", out);
        found.add(String.valueOf(out.toString().hashCode()));
    }

    private static String cancel(Connection connection, String url) throws Exception {
        try (Statement statement = connection.createStatement(); Connection other = DriverManager.getConnection(url)) {
            String running = "SELECT count(*) FROM pg_stat_activity WHERE state = 'active' AND query = '" + SLEEP + "'";
            Thread canceller = new Thread(() -> {
                try {
                    while (one(other, running).equals("0")) {
                        Thread.onSpinWait();
                    }
                    statement.cancel();
                } catch (SQLException error) {
                    throw new IllegalStateException(error);
                }
            });
            canceller.start();
            String state = sqlState(() -> statement.executeQuery(SLEEP));
            canceller.join();
            return state + " " + one(connection, "SELECT 7");
        }
    }

    private static String timeout(Connection connection) throws SQLException {
        try (Statement statement = connection.createStatement()) {
            statement.setQueryTimeout(1);
            String state = sqlState(() -> statement.executeQuery(SLEEP));
            return state + " " + one(connection, "SELECT 7");
        }
    }
}
