//! The console's side of the wire: the simple and the extended protocol by `pgwire`, over a connection that has
//! already logged in.
//!
//! Reading is ours: a message is taken only whole, and only up to `limits.statement_text`, and while one is awaited the
//! session can be told to end. What a message says, and the answer, are the crate's; so are portals.

use std::collections::HashSet;
use std::fmt::Debug;
use std::future::poll_fn;
use std::sync::{Arc, Mutex};
use std::task::Poll;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use bytes::BytesMut;
use futures_util::{Sink, SinkExt as _, stream};
use pgwire::api::portal::{Format, Portal};
use pgwire::api::query::{ExtendedQueryHandler, SimpleQueryHandler};
use pgwire::api::results::{FieldFormat, FieldInfo, QueryResponse, Response, Tag};
use pgwire::api::stmt::{QueryParser, StoredStatement};
use pgwire::api::store::{Entry, PortalStore};
use pgwire::api::{
    ClientInfo, ClientPortalStore, DEFAULT_NAME, DefaultClient, NoopHandler, PgWireConnectionState, Type,
};
use pgwire::error::{ErrorInfo, PgWireError, PgWireResult};
use pgwire::messages::data::DataRow;
use pgwire::messages::extendedquery::{
    Bind, BindComplete, Close, CloseComplete, Parse, ParseComplete, TARGET_TYPE_BYTE_STATEMENT,
};
use pgwire::messages::response::{NoticeResponse, TransactionStatus as Status};
use pgwire::messages::{PgWireBackendMessage, PgWireFrontendMessage};
use pgwire::tokio::server::{PgWireMessageServerCodec, process_error, process_message};
use tokio::io::AsyncWriteExt as _;
use tokio_util::codec::{Decoder as _, Framed};

use super::command::{self, Command, Refused};
use super::reply::{Column, Kind, Rows};
use super::{Asker, Console};
use crate::backend::poll_fill;
use crate::net::Stream;
use crate::session::Arrival;
use crate::session::facts::Kind as SessionKind;
use crate::session::handle::{Ending, SessionHandle};
use crate::topology::NodeId;
use crate::wire::{self, ErrorReport, TransactionStatus};

/// How long last words may take.
const LAST_WORDS: Duration = Duration::from_secs(5);

/// What a command answers.
pub(super) enum Reply {
    /// Rows.
    Rows {
        /// Their columns.
        columns: Vec<Column>,
        /// They.
        rows: Rows,
        /// The command's tag.
        tag: &'static str,
    },
    /// Nothing but its tag, and notices before it.
    Done {
        /// The tag.
        tag: &'static str,
        /// What else there is to say.
        notices: Vec<String>,
    },
}

type Socket = Framed<Stream, PgWireMessageServerCodec<Arc<Command>>>;

/// Serves one administrator.
pub(super) async fn serve(console: Arc<Console>, mut arrival: Arrival) {
    let sessions = console.shared.sessions.clone();
    let identity = arrival.identity(SessionKind::Console);
    let handle = sessions.register(if arrival.minor >= 2 { 32 } else { 4 }, identity);
    let _registered = crate::session::Registered::new(sessions, handle.pid);
    if let Some(name) = arrival.startup.take_application_name() {
        handle.facts.call_application(name.as_bytes());
    }
    let mut welcome = Vec::new();
    put_welcome(&console, &handle, &mut welcome);
    if arrival.stream.write_all(&welcome).await.is_err() || arrival.stream.flush().await.is_err() {
        return;
    }
    let peer = arrival.peer.unwrap_or_else(|| ([0, 0, 0, 0], 0).into());
    let mut client = DefaultClient::new(peer, arrival.stream.is_tls());
    client.set_state(PgWireConnectionState::ReadyForQuery);
    let socket = Framed::new(arrival.stream, PgWireMessageServerCodec::new(client));
    let names = Arc::default();
    let handler = Arc::new(Handler { console, handle: handle.clone(), names });
    let mut connection = Connection { socket, input: BytesMut::new(), handler };
    handle.facts.rests(TransactionStatus::Idle, None);
    let last = connection.run().await;
    let mut stream = connection.socket.into_inner();
    let said = async {
        if let Some(report) = last {
            let mut out = Vec::new();
            report.put(&mut out);
            stream.write_all(&out).await?;
        }
        stream.shutdown().await
    };
    // A client that does not read must not keep its place.
    let _: Result<std::io::Result<()>, _> = tokio::time::timeout(LAST_WORDS, said).await;
}

fn put_welcome(console: &Console, handle: &SessionHandle, out: &mut Vec<u8>) {
    let asker = Asker { console, handle };
    for name in command::PARAMETERS.iter().filter(|name| is_reported(name)) {
        wire::put(out, b'S', |out| {
            wire::put_cstr(out, name.as_bytes());
            // Zero bytes cannot have come in: a startup packet's texts end with one.
            wire::put_cstr(out, asker.parameter(name).as_bytes());
        });
    }
    wire::put(out, b'K', |out| {
        out.extend_from_slice(&handle.pid.to_be_bytes());
        out.extend_from_slice(&handle.key);
    });
    wire::put(out, b'Z', |out| out.push(TransactionStatus::Idle.byte()));
}

/// PostgreSQL reports these to its clients.
fn is_reported(name: &str) -> bool {
    !matches!(
        name,
        "server_version_num"
            | "transaction_isolation"
            | "default_transaction_isolation"
            | "transaction_read_only"
    )
}

struct Connection {
    socket: Socket,
    input: BytesMut,
    handler: Arc<Handler>,
}

/// What comes next.
enum Next {
    Message(PgWireFrontendMessage),
    Gone,
    Last(ErrorReport),
}

impl Connection {
    /// Up to the connection's end; the last word, if one is due.
    async fn run(&mut self) -> Option<ErrorReport> {
        loop {
            let message = match self.next().await {
                Next::Message(PgWireFrontendMessage::Terminate(_)) | Next::Gone => return None,
                Next::Message(message) => message,
                Next::Last(report) => return Some(report),
            };
            let handle = self.handler.handle.clone();
            handle.facts.begins(Instant::now());
            handle.begin();
            let done = self.answer(message).await;
            handle.idle();
            let status = match self.socket.transaction_status() {
                Status::Idle => TransactionStatus::Idle,
                Status::Transaction => TransactionStatus::InTransaction,
                Status::Error => TransactionStatus::Failed,
            };
            handle.facts.rests(status, None::<NodeId>);
            if done.is_err() {
                return None;
            }
        }
    }

    async fn answer(&mut self, message: PgWireFrontendMessage) -> std::io::Result<()> {
        let extended = matches!(
            message,
            PgWireFrontendMessage::Parse(_)
                | PgWireFrontendMessage::Bind(_)
                | PgWireFrontendMessage::Describe(_)
                | PgWireFrontendMessage::Execute(_)
                | PgWireFrontendMessage::Close(_)
                | PgWireFrontendMessage::Flush(_)
        );
        let nobody = Arc::new(NoopHandler);
        let handler = &self.handler;
        let processed = process_message(
            message,
            &mut self.socket,
            nobody.clone(),
            handler.clone(),
            handler.clone(),
            nobody.clone(),
            nobody,
        );
        match processed.await {
            Ok(()) => Ok(()),
            Err(PgWireError::IoError(error)) => Err(error),
            Err(error) => process_error(&mut self.socket, in_postgresqls_words(error), extended).await,
        }
    }

    /// The next message, whole.
    async fn next(&mut self) -> Next {
        let most = self.handler.console.shared.config.load().limits.statement_text;
        let handle = self.handler.handle.clone();
        loop {
            match wire::header(&self.input) {
                Ok(Some(header)) if header.len > most => {
                    return Next::Last(ErrorReport::fatal("08P01", "invalid message length"));
                }
                Ok(Some(header)) if header.len <= self.input.len() => {
                    let mut message = self.input.split_to(header.len);
                    return match self.socket.codec_mut().decode(&mut message) {
                        Ok(Some(message)) => Next::Message(message),
                        Ok(None) | Err(_) => {
                            Next::Last(ErrorReport::fatal("08P01", "invalid message format"))
                        }
                    };
                }
                Ok(_) => {}
                Err(error) => return Next::Last(ErrorReport::fatal("08P01", error.to_string())),
            }
            let (stream, input) = (self.socket.get_mut(), &mut self.input);
            let read = poll_fn(|cx| match handle.poll_ending(cx) {
                Ending::No => poll_fill(stream, input, cx).map(Some),
                Ending::WhenIdle | Ending::Now => Poll::Ready(None),
            });
            match read.await {
                Some(Ok(n)) if n > 0 => {}
                Some(_) => return Next::Gone,
                None => {
                    let words = "terminating connection due to administrator command";
                    return Next::Last(ErrorReport::fatal("57P01", words));
                }
            }
        }
    }
}

/// What the crate says of a name that it does not know.
fn in_postgresqls_words(error: PgWireError) -> PgWireError {
    let report = match error {
        PgWireError::StatementNotFound(name) => {
            ErrorReport::error("26000", format!("prepared statement \"{name}\" does not exist"))
        }
        PgWireError::PortalNotFound(name) => {
            ErrorReport::error("34000", format!("portal \"{name}\" does not exist"))
        }
        other => return other,
    };
    failure(&report, None)
}

fn info(report: &ErrorReport, position: Option<usize>) -> ErrorInfo {
    let severity = report.severity.text().to_owned();
    let mut info = ErrorInfo::new(severity.clone(), report.sqlstate.to_owned(), report.message.clone());
    info.severity_nonlocalized = Some(severity);
    info.detail = report.detail.clone();
    info.hint = report.hint.clone();
    info.position = position.map(|position| position.to_string());
    info.routine = Some(report.routine.to_owned());
    info
}

fn failure(report: &ErrorReport, position: Option<usize>) -> PgWireError {
    PgWireError::UserError(Box::new(info(report, position)))
}

fn refused(refused: &Refused) -> PgWireError {
    failure(&refused.report, Some(refused.position))
}

/// One connection's commands.
struct Handler {
    console: Arc<Console>,
    handle: Arc<SessionHandle>,
    /// Statements and portals that have names.
    names: Arc<Mutex<HashSet<(u8, String)>>>,
}

impl Handler {
    /// Keeps the number of names bounded.
    fn name(&self, kind: u8, name: &str) -> PgWireResult<()> {
        let most = self.console.shared.config.load().limits.statements_per_session;
        let mut names = self.names.lock().unwrap_or_else(|p| p.into_inner());
        let key = (kind, name.to_owned());
        if names.len() >= most && !names.contains(&key) {
            let report = ErrorReport::error("53400", "too many prepared statements and portals")
                .hint("Raise limits.statements_per_session.");
            return Err(failure(&report, None));
        }
        names.insert(key);
        Ok(())
    }

    /// Runs one command; rows in these formats.
    async fn run<C>(&self, client: &mut C, command: &Command, format: &Format) -> Result<Response, ErrorInfo>
    where
        C: ClientInfo + Sink<PgWireBackendMessage> + Unpin + Send,
    {
        let status = client.transaction_status();
        if status == Status::Error && !matches!(command, Command::Commit | Command::Rollback) {
            let words = "current transaction is aborted, commands ignored until end of transaction block";
            return Err(info(&ErrorReport::error("25P02", words), None));
        }
        match command {
            Command::Begin => return Ok(Response::TransactionStart(Tag::new("BEGIN"))),
            Command::Commit | Command::Rollback => {
                let commits = *command == Command::Commit && status != Status::Error;
                return Ok(Response::TransactionEnd(Tag::new(if commits { "COMMIT" } else { "ROLLBACK" })));
            }
            _ => {}
        }
        let asker = Asker { console: &self.console, handle: &self.handle };
        let reply = asker.answer(command).await.map_err(|report| info(&report, None))?;
        match reply {
            Reply::Done { tag, notices } => {
                for notice in notices {
                    let fields = vec![
                        (b'S', "NOTICE".to_owned()),
                        (b'V', "NOTICE".to_owned()),
                        (b'C', "00000".to_owned()),
                        (b'M', notice),
                    ];
                    let notice = PgWireBackendMessage::NoticeResponse(NoticeResponse::new(fields));
                    // A client that is gone is found out by the next write.
                    let _ = client.feed(notice).await;
                }
                Ok(Response::Execution(Tag::new(tag)))
            }
            Reply::Rows { columns, rows, tag } => {
                let schema = Arc::new(fields(&columns, format));
                let binary: Vec<bool> = schema.iter().map(|f| f.format() == FieldFormat::Binary).collect();
                let count = i16::try_from(columns.len()).unwrap_or(i16::MAX);
                let rows = rows.map(move |row| {
                    debug_assert_eq!(row.len(), binary.len(), "a value for each column");
                    let mut data = BytesMut::new();
                    for (value, binary) in row.iter().zip(&binary) {
                        value.put(*binary, &mut data);
                    }
                    Ok(DataRow::new(data, count))
                });
                let mut response = QueryResponse::new(schema, stream::iter(rows));
                response.set_command_tag(tag);
                Ok(Response::Query(response))
            }
        }
    }
}

fn fields(columns: &[Column], format: &Format) -> Vec<FieldInfo> {
    let field = |(index, column): (usize, &Column)| {
        let (kind, size) = match column.kind {
            Kind::Text => (Type::TEXT, -1),
            Kind::Int => (Type::INT8, 8),
            Kind::Float => (Type::FLOAT8, 8),
            Kind::Bool => (Type::BOOL, 1),
            Kind::Time => (Type::TIMESTAMPTZ, 8),
        };
        FieldInfo::new(column.name.to_string(), None, None, kind, format.format_for(index))
            .with_type_size(size)
    };
    columns.iter().enumerate().map(field).collect()
}

#[async_trait]
impl SimpleQueryHandler for Handler {
    async fn do_query<C>(&self, client: &mut C, query: &str) -> PgWireResult<Vec<Response>>
    where
        C: ClientInfo + ClientPortalStore + Sink<PgWireBackendMessage> + Unpin + Send + Sync,
        C::PortalStore: PortalStore,
        C::Error: Debug,
        PgWireError: From<<C as Sink<PgWireBackendMessage>>::Error>,
    {
        let commands = command::parse(query).map_err(|why| refused(&why))?;
        if commands.is_empty() {
            return Ok(vec![Response::EmptyQuery]);
        }
        let mut responses = Vec::new();
        for command in &commands {
            let ran = match command.parameters() {
                0 => self.run(client, command, &Format::UnifiedText).await,
                _ => Err(info(&ErrorReport::error("42P02", "there is no parameter $1"), None)),
            };
            match ran {
                Ok(response) => {
                    match response {
                        Response::TransactionStart(_) if client.transaction_status() == Status::Idle => {
                            client.set_transaction_status(Status::Transaction);
                        }
                        Response::TransactionEnd(_) => client.set_transaction_status(Status::Idle),
                        _ => {}
                    }
                    responses.push(response);
                }
                Err(error) => {
                    responses.push(Response::Error(Box::new(error)));
                    break;
                }
            }
        }
        Ok(responses)
    }
}

/// Reads commands for the extended protocol.
struct Parser;

#[async_trait]
impl QueryParser for Parser {
    type Statement = Arc<Command>;

    async fn parse_sql<C>(
        &self,
        _client: &C,
        sql: &str,
        _types: &[Option<Type>],
    ) -> PgWireResult<Option<Arc<Command>>>
    where
        C: ClientInfo + Unpin + Send + Sync,
    {
        let mut commands = command::parse(sql).map_err(|why| refused(&why))?;
        match commands.len() {
            0 => Ok(None),
            1 => Ok(commands.pop().map(Arc::new)),
            _ => {
                let words = "cannot insert multiple commands into a prepared statement";
                Err(failure(&ErrorReport::error("42601", words), None))
            }
        }
    }

    fn get_parameter_types(&self, command: &Arc<Command>) -> PgWireResult<Vec<Type>> {
        let kind = if command.takes_numbers() { Type::INT8 } else { Type::TEXT };
        Ok(vec![kind; command.parameters()])
    }

    fn get_result_schema(
        &self,
        command: &Arc<Command>,
        format: Option<&Format>,
    ) -> PgWireResult<Vec<FieldInfo>> {
        let columns = super::show::columns(command).map_err(|report| failure(&report, None))?;
        Ok(fields(&columns, format.unwrap_or(&Format::UnifiedText)))
    }
}

/// The text of a parameter, however it was sent.
fn parameter(value: &[u8], binary: bool, kind: Option<&Type>) -> Result<String, ErrorReport> {
    let number = binary && !matches!(kind, Some(k) if [Type::TEXT, Type::VARCHAR, Type::NAME].contains(k));
    let invalid = || ErrorReport::error("22P03", "incorrect binary data format in a parameter");
    if !number || kind == Some(&Type::UNKNOWN) {
        let text = std::str::from_utf8(value);
        return text.map(str::to_owned).map_err(|_| ErrorReport::error("22021", "a parameter is not UTF-8"));
    }
    match value.len() {
        2 => value.first_chunk().map(|bytes| i16::from_be_bytes(*bytes).to_string()),
        4 => value.first_chunk().map(|bytes| i32::from_be_bytes(*bytes).to_string()),
        8 => value.first_chunk().map(|bytes| i64::from_be_bytes(*bytes).to_string()),
        _ => None,
    }
    .ok_or_else(invalid)
}

fn format_count_fits(codes: &[i16], of: usize) -> bool {
    codes.len() <= 1 || codes.len() == of
}

#[async_trait]
impl ExtendedQueryHandler for Handler {
    type Statement = Arc<Command>;
    type QueryParser = Parser;

    fn query_parser(&self) -> Arc<Parser> {
        Arc::new(Parser)
    }

    async fn on_parse<C>(&self, client: &mut C, message: Parse) -> PgWireResult<()>
    where
        C: ClientInfo + ClientPortalStore + Sink<PgWireBackendMessage> + Unpin + Send + Sync,
        C::PortalStore: PortalStore<Statement = Self::Statement>,
        C::Error: Debug,
        PgWireError: From<<C as Sink<PgWireBackendMessage>>::Error>,
    {
        let name = message.name.clone().unwrap_or_else(|| DEFAULT_NAME.to_owned());
        let statement = StoredStatement::parse(client, &message, self.query_parser()).await?;
        self.name(b'S', &name)?;
        match statement {
            Some(statement) => client.portal_store().put_statement(Arc::new(statement)),
            None => client.portal_store().put_empty_statement(&name),
        }
        client.feed(PgWireBackendMessage::ParseComplete(ParseComplete::new())).await?;
        Ok(())
    }

    async fn on_bind<C>(&self, client: &mut C, message: Bind) -> PgWireResult<()>
    where
        C: ClientInfo + ClientPortalStore + Sink<PgWireBackendMessage> + Unpin + Send + Sync,
        C::PortalStore: PortalStore<Statement = Self::Statement>,
        C::Error: Debug,
        PgWireError: From<<C as Sink<PgWireBackendMessage>>::Error>,
    {
        let statement_name = message.statement_name.as_deref().unwrap_or(DEFAULT_NAME);
        let portal_name = message.portal_name.as_deref().unwrap_or(DEFAULT_NAME);
        let Some(statement) = client.portal_store().get_statement(statement_name) else {
            return Err(PgWireError::StatementNotFound(statement_name.to_owned()));
        };
        let (needs, columns) = match &statement {
            Entry::Value(statement) => {
                let columns = super::show::columns(&statement.statement);
                let columns = columns.map_err(|report| failure(&report, None))?.len();
                (statement.statement.parameters(), columns)
            }
            Entry::Empty => (0, 0),
        };
        // The crate would look up a format behind the last one.
        if message.parameters.len() < needs
            || !format_count_fits(&message.parameter_format_codes, message.parameters.len())
            || !format_count_fits(&message.result_column_format_codes, columns)
        {
            let words = format!(
                "bind message does not fit prepared statement \"{statement_name}\" with {needs} parameters and {columns} columns"
            );
            return Err(failure(&ErrorReport::error("08P01", words), None));
        }
        self.name(b'P', portal_name)?;
        match statement {
            Entry::Value(statement) => {
                client.portal_store().put_portal(Arc::new(Portal::try_new(&message, statement)?));
            }
            Entry::Empty => client.portal_store().put_empty_portal(portal_name),
        }
        client.feed(PgWireBackendMessage::BindComplete(BindComplete::new())).await?;
        Ok(())
    }

    async fn on_close<C>(&self, client: &mut C, message: Close) -> PgWireResult<()>
    where
        C: ClientInfo + ClientPortalStore + Sink<PgWireBackendMessage> + Unpin + Send + Sync,
        C::PortalStore: PortalStore<Statement = Self::Statement>,
        C::Error: Debug,
        PgWireError: From<<C as Sink<PgWireBackendMessage>>::Error>,
    {
        let name = message.name.as_deref().unwrap_or(DEFAULT_NAME);
        let is_statement = message.target_type == TARGET_TYPE_BYTE_STATEMENT;
        if is_statement {
            client.portal_store().rm_statement(name);
        } else {
            client.portal_store().rm_portal(name);
        }
        let kind = if is_statement { b'S' } else { b'P' };
        self.names.lock().unwrap_or_else(|p| p.into_inner()).remove(&(kind, name.to_owned()));
        client.feed(PgWireBackendMessage::CloseComplete(CloseComplete::new())).await?;
        Ok(())
    }

    async fn do_query<C>(
        &self,
        client: &mut C,
        portal: &Portal<Arc<Command>>,
        _max_rows: usize,
    ) -> PgWireResult<Response>
    where
        C: ClientInfo + ClientPortalStore + Sink<PgWireBackendMessage> + Unpin + Send + Sync,
        C::PortalStore: PortalStore<Statement = Self::Statement>,
        C::Error: Debug,
        PgWireError: From<<C as Sink<PgWireBackendMessage>>::Error>,
    {
        let mut values = Vec::new();
        for (index, value) in portal.parameters.iter().enumerate() {
            let kind = portal.statement.parameter_types.get(index).and_then(Option::as_ref);
            let default = self.query_parser().get_parameter_types(&portal.statement.statement)?;
            let kind = kind.filter(|kind| **kind != Type::UNKNOWN).or(default.get(index));
            let binary = portal.parameter_format.is_binary(index);
            let text = value.as_ref().map(|value| parameter(value, binary, kind)).transpose();
            values.push(text.map_err(|report| failure(&report, None))?);
        }
        let command = Command::clone(&portal.statement.statement)
            .with(&values)
            .map_err(|report| failure(&report, None))?;
        self.run(client, &command, &portal.result_column_format)
            .await
            .map_err(|error| PgWireError::UserError(Box::new(error)))
    }
}
