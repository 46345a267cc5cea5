"""Statements that are compiled once, and then run by the database's driver itself.

SQLAlchemy writes the SQL, and says how values go in and come out; what it would do again at each call is
done once. On SQLite that makes a statement of a turn several times cheaper than `Connection.execute`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from operator import itemgetter
from typing import Any

from sqlalchemy import Boolean, Connection, Float, LargeBinary
from sqlalchemy.engine import Dialect
from sqlalchemy.exc import DBAPIError
from sqlalchemy.sql.elements import CompilerElement
from sqlalchemy.types import TypeEngine

Row = tuple[Any, ...]
Values = Mapping[str, Any]
Processor = Callable[[Any], Any]


class _Compiled:
    """A statement for one kind of database: what makes of its values what the driver takes, and of the
    driver's columns what they mean."""

    def __init__(self, statement: Any, dialect: Dialect, names: Sequence[str]) -> None:
        # Only an INSERT takes its columns from the names; elsewhere they are those of its parameters.
        columns = names if getattr(statement, "is_insert", False) else None
        compiled: Any = statement.compile(dialect=dialect, column_keys=columns)
        dbapi: Any = dialect.loaded_dbapi
        self.sql = str(compiled)
        self.error: type[Exception] = dbapi.Error
        self._dialect = dialect
        self._columns = _columns(statement)
        self._is_positional = compiled.positional
        self._constants = {name: bind.value for name, bind in compiled.binds.items() if not bind.required}
        self._order = compiled.positiontup if compiled.positional else list(compiled.binds)
        self._pick: Callable[[Values], Row] = _picking(self._order)
        takes = [_takes(compiled.binds[name].type, dialect) for name in self._order]
        self._takes = [(place, make) for place, make in enumerate(takes) if make is not None]
        self._gives: list[Processor | None] | None = None
        is_plain = self._is_positional and not self._constants and not self._takes
        self.bound: Callable[[Values], Any] = self._pick if is_plain else self._bound
        """Makes of values what the driver takes."""

    def _bound(self, values: Values) -> Any:
        if self._constants:
            values = {**self._constants, **values}
        row: Sequence[Any] = self._pick(values)
        if self._takes:
            row = taken = list(row)
            for place, make in self._takes:
                taken[place] = make(taken[place])
        return row if self._is_positional else dict(zip(self._order, row, strict=True))

    def rows(self, cursor: Any, rows: Sequence[Row]) -> Sequence[Row]:
        """Rows as the driver gives them, read."""
        if self._gives is None:  # what a column needs depends also on what the driver makes of it
            types = [column[1] for column in cursor.description]
            found = [
                _gives(kind, self._dialect, code) for kind, code in zip(self._columns, types, strict=True)
            ]
            self._gives = found if any(found) else []
        if not self._gives:
            return rows
        return [
            tuple(
                value if make is None else make(value) for make, value in zip(self._gives, row, strict=True)
            )
            for row in rows
        ]


class Prepared:
    """A statement, for all connections. Every call must give the values of the same names; an INSERT has
    the columns that they name. Raises what SQLAlchemy raises. The statement must have no lists in it that
    differ in length (`IN`)."""

    def __init__(self, statement: CompilerElement | Callable[[str], CompilerElement]) -> None:
        """`statement`, or what makes one for a dialect: `sqlite` or `postgresql`."""
        self._statement = statement
        self._compiled: dict[str, _Compiled] = {}

    def run(self, connection: Connection, values: Values) -> int:
        """Runs it, and tells how many rows it has changed."""
        return int(self._execute(connection, values)[1].rowcount)

    def run_all(self, connection: Connection, rows: Sequence[Values]) -> None:
        """Runs it with the values of each row."""
        compiled = self._compiled.get(connection.dialect.name) or self._compile(connection, rows[0])
        try:
            driver_of(connection).cursor().executemany(compiled.sql, [compiled.bound(row) for row in rows])
        except compiled.error as error:
            raise _as_sqlalchemy_raises(connection, error) from error

    def first(self, connection: Connection, values: Values) -> Row | None:
        """Its first row."""
        compiled, cursor = self._execute(connection, values)
        row = cursor.fetchone()
        return None if row is None else compiled.rows(cursor, (row,))[0]

    def one(self, connection: Connection, values: Values) -> Row:
        """Its first row, which must be there."""
        row = self.first(connection, values)
        assert row is not None
        return row

    def all(self, connection: Connection, values: Values) -> Sequence[Row]:
        """All of its rows."""
        compiled, cursor = self._execute(connection, values)
        return compiled.rows(cursor, cursor.fetchall())

    def _execute(self, connection: Connection, values: Values) -> tuple[_Compiled, Any]:
        compiled = self._compiled.get(connection.dialect.name) or self._compile(connection, values)
        raw = _drivers.get(connection) or driver_of(connection)
        try:
            return compiled, raw.execute(compiled.sql, compiled.bound(values))
        except compiled.error as error:
            raise _as_sqlalchemy_raises(connection, error) from error

    def _compile(self, connection: Connection, values: Values) -> _Compiled:
        made, name = self._statement, connection.dialect.name
        statement = made if isinstance(made, CompilerElement) else made(name)
        compiled = self._compiled[name] = _Compiled(statement, connection.dialect, list(values))
        return compiled


_drivers: dict[Connection, Any] = {}
"""The driver's connection of those that are used all the time: to ask SQLAlchemy for it takes as long as a
short statement."""


def keep_driver(connection: Connection) -> Any:
    """Keeps the driver's connection at hand, and returns it, until `let_go`."""
    raw = _drivers[connection] = connection.connection.driver_connection
    return raw


def let_go(connection: Connection) -> None:
    """Closes a connection whose driver's was kept at hand."""
    _drivers.pop(connection, None)
    connection.close()


def driver_of(connection: Connection) -> Any:
    """The driver's own connection."""
    return _drivers.get(connection) or connection.connection.driver_connection


def _picking(names: Sequence[str]) -> Callable[[Values], Row]:
    """What picks the values of some names."""
    if len(names) > 1:
        return itemgetter(*names)
    return lambda values: tuple(values[name] for name in names)


def _columns(statement: Any) -> list[TypeEngine[Any]]:
    is_select = getattr(statement, "is_select", False)
    columns = statement.selected_columns if is_select else getattr(statement, "exported_columns", ())
    return [column.type for column in columns]


_TAKEN_AS_THEY_ARE = (Boolean, Float, LargeBinary)
"""What drivers take as it is, though SQLAlchemy would look at each value."""


def _takes(kind: TypeEngine[Any], dialect: Dialect) -> Processor | None:
    if isinstance(kind, _TAKEN_AS_THEY_ARE):
        return None
    return kind.dialect_impl(dialect).bind_processor(dialect)


def _gives(kind: TypeEngine[Any], dialect: Dialect, code: object) -> Processor | None:
    return kind.dialect_impl(dialect).result_processor(dialect, code)


def _as_sqlalchemy_raises(connection: Connection, error: Any) -> Exception:
    """The driver's error as SQLAlchemy's, its connection given up where the database has gone."""
    dialect = connection.dialect
    dbapi: Any = dialect.loaded_dbapi
    raw = driver_of(connection)
    is_lost = dialect.is_disconnect(error, raw, None)
    if is_lost:
        connection.invalidate(error)
    raised: Exception = DBAPIError.instance(
        None, None, error, dbapi.Error, hide_parameters=True, connection_invalidated=is_lost, dialect=dialect
    )
    return raised
