// The admin console as Grafana's PostgreSQL data source uses it: through database/sql with lib/pq (Grafana 11 and
// before) and with pgx (later), without parameters, macros already expanded.
package main

import (
	"context"
	"database/sql"
	"fmt"
	"os"
	"time"

	_ "github.com/jackc/pgx/v4/stdlib"
	_ "github.com/lib/pq"
)

func check(err error, what string) {
	if err != nil {
		fmt.Fprintf(os.Stderr, "%s: %v\n", what, err)
		os.Exit(1)
	}
}

// Rows as Grafana makes a frame of them: by the columns' names and types.
func frame(db *sql.DB, query string) ([]string, []string, [][]any) {
	rows, err := db.QueryContext(context.Background(), query)
	check(err, query)
	defer rows.Close()
	names, err := rows.Columns()
	check(err, query)
	described, err := rows.ColumnTypes()
	check(err, query)
	var types []string
	for _, column := range described {
		types = append(types, column.DatabaseTypeName())
	}
	var found [][]any
	for rows.Next() {
		row, places := make([]any, len(names)), make([]any, len(names))
		for at := range row {
			places[at] = &row[at]
		}
		check(rows.Scan(places...), query)
		found = append(found, row)
	}
	check(rows.Err(), query)
	return names, types, found
}

func expect(is bool, what string, seen any) {
	if !is {
		fmt.Fprintf(os.Stderr, "%s: %v\n", what, seen)
		os.Exit(1)
	}
}

func use(driver string) {
	// What Grafana writes; host, port and password are of the environment.
	db, err := sql.Open(driver, "dbname='highwater' sslmode='disable'")
	check(err, driver)
	defer db.Close()
	check(db.PingContext(context.Background()), "ping")
	// "Save & test".
	_, _, rows := frame(db, "SELECT 1")
	expect(len(rows) == 1 && rows[0][0] == int64(1), "SELECT 1", rows)
	for _, query := range []string{"SELECT version()", "SELECT current_database()",
		"SELECT current_setting('server_version_num')::int/100 as version"} {
		_, _, rows := frame(db, query)
		expect(len(rows) == 1, query, rows)
		fmt.Println(driver, query, rows[0][0] != nil)
	}
	names, types, rows := frame(db, "SELECT name, role, lag_seconds FROM nodes LIMIT 50")
	expect(len(rows) == 3 && rows[0][0] == "a" && rows[0][1] == "primary", "nodes", rows)
	fmt.Println(driver, names, types)
	// A time series: $__time(now()) is expanded to this.
	names, types, rows = frame(db, "SELECT now() AS \"time\", name AS metric, lag_seconds AS value FROM nodes")
	_, is := rows[0][0].(time.Time)
	expect(is && len(rows) == 3, "time series", rows)
	fmt.Println(driver, names, types)
	_, _, rows = frame(db, "SELECT connected AS \"time\", pid FROM sessions")
	_, is = rows[0][0].(time.Time)
	expect(is, "sessions", rows)
}

func main() {
	for _, driver := range []string{"postgres", "pgx"} {
		use(driver)
	}
}
