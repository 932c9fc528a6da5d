// Node's pg, asked line by line: a task and the options of a connection as JSON, with a tab between them.
// Answers in one line each: "ok" and a value, or "error" with its code and text.

'use strict'

const readline = require('node:readline')
const { Client, Pool } = require('pg')

const SLEEP = 'SELECT pg_sleep(60)'

async function withClient(options, work) {
  const client = new Client(options)
  client.on('error', () => {}) // a second one, behind that which ended it
  await client.connect()
  try {
    return await work(client)
  } finally {
    await client.end()
  }
}

async function codeOf(promise) {
  try {
    await promise
  } catch (error) {
    return error.code
  }
  throw new Error('no error came')
}

const tasks = {
  async who(options) {
    return withClient(options, async (client) => {
      const { rows } = await client.query('SELECT current_user AS name')
      return rows[0].name
    })
  },

  // The extended protocol with and without a name, transactions, errors, large answers.
  async work(options) {
    return withClient(options, async (client) => {
      const found = []
      const doubled = { name: 'doubled', text: 'SELECT $1::int * 2 AS n, $2::text AS word' }
      for (let turn = 0; turn < 12; turn++) {
        const { rows } = await client.query({ ...doubled, values: [turn, "it's"] })
        found.push(rows[0].n, rows[0].word)
        const unnamed = await client.query('SELECT $1::numeric AS n, $2::bytea AS data', [turn, Buffer.from('\0a')])
        found.push(unnamed.rows[0].n, unnamed.rows[0].data.toString('hex'))
      }
      await client.query('BEGIN')
      await client.query('INSERT INTO numbers SELECT n, $1 FROM generate_series(1, 100) n', ['kept'])
      await client.query('SAVEPOINT one')
      found.push(await codeOf(client.query('INSERT INTO numbers VALUES ($1, $2)', [1, 'twice'])))
      found.push(await codeOf(client.query(doubled)))
      await client.query('ROLLBACK TO one')
      await client.query('COMMIT')
      await client.query('BEGIN')
      await client.query('DELETE FROM numbers')
      await client.query('ROLLBACK')
      for (const wrong of ['SELECT 1/0', 'nonsense']) {
        found.push(await codeOf(client.query(wrong)))
      }
      const several = await client.query('SELECT 1 AS n; SELECT 2 AS n')
      found.push(several.map((one) => one.rows[0].n))
      const large = await client.query('SELECT n, repeat(md5(n::text), 10) AS data FROM generate_series(1, 20000) n')
      found.push(large.rows.length, large.rows[19999].data)
      found.push((await client.query('SELECT count(*) FROM numbers')).rows[0].count)
      return JSON.stringify(found)
    })
  },

  // More clients than servers.
  async pool(options) {
    const pool = new Pool({ ...options, max: 12 })
    try {
      const sums = await Promise.all(
        Array.from({ length: 12 }, async (_, number) => {
          let sum = 0
          for (let turn = 0; turn < 10; turn++) {
            const { rows } = await pool.query({ name: 'sum', text: 'SELECT $1::int + $2::int AS n', values: [number, turn] })
            sum += rows[0].n
          }
          return sum
        })
      )
      return String(sums.reduce((one, other) => one + other))
    } finally {
      await pool.end()
    }
  },

  // pg sends the request in clear text, on a connection of its own.
  async cancel(options) {
    return withClient(options, async (client) => {
      const { Query } = require('pg')
      const query = new Query(SLEEP)
      const ended = new Promise((resolve) => query.on('error', (error) => resolve(error.code)))
      client.query(query)
      await withClient(options, async (watcher) => {
        const running = "SELECT 1 FROM pg_stat_activity WHERE state = 'active' AND query = $1"
        while ((await watcher.query(running, [SLEEP])).rowCount === 0) {}
      })
      new Client({ ...options, ssl: false }).cancel(client, query)
      const code = await ended
      return `${code} ${(await client.query('SELECT 7 AS n')).rows[0].n}`
    })
  },

  // What pg calls a timeout: it gives up and leaves.
  async timeout(options) {
    try {
      await withClient({ ...options, query_timeout: 300 }, (client) => client.query(SLEEP))
    } catch (error) {
      return error.message
    }
  },
}

function answer(...parts) {
  process.stdout.write(parts.map((part) => String(part).replace(/[\t\n]/g, ' ')).join('\t') + '\n')
}

async function main() {
  for await (const line of readline.createInterface({ input: process.stdin })) {
    const [task, options] = line.split('\t')
    try {
      answer('ok', await tasks[task](JSON.parse(options)))
    } catch (error) {
      answer('error', error.code || '', error.message)
    }
  }
}

main()
